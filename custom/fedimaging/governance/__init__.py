"""The site's word: what its data owner allows (grants) and what was done (the ledger). It knows nothing of FLARE."""
