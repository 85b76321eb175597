"""What a hospital's images are and where they lie: manifests, image reading, indexing, the site's dataset file."""
