"""Subnetworks: which coordinates of a source are trained or kept. No torch is imported here."""

from deltalens.subnetwork.intervene import Intervention, intervene
from deltalens.subnetwork.mask import SubnetworkMask, source_hash
from deltalens.subnetwork.select import select_mask

__all__ = ["Intervention", "SubnetworkMask", "intervene", "select_mask", "source_hash"]
