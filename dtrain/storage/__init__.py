"""Durable bytes, locks and leases, on a disk or on gs://."""
