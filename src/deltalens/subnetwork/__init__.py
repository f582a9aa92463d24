"""Subnetworks: which coordinates of a source are trained or kept. No torch is imported here."""

from deltalens.subnetwork.mask import SubnetworkMask, source_hash

__all__ = ["SubnetworkMask", "source_hash"]
