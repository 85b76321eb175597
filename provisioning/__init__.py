"""Provisioning: a signed startup kit for every participant of a federation."""
