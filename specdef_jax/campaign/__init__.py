"""A defence and all attacks on it: what each recovers, what it costs, what its author must know."""

from specdef_jax.campaign.auto import Trial, Verdict, auto
from specdef_jax.campaign.defence import Defence, chain, of_tree, rescaled_channels
from specdef_jax.campaign.frontier import Point, frontier
from specdef_jax.campaign.ledger import Entry, Ledger, ledger
from specdef_jax.campaign.planner import Proposal, planner
from specdef_jax.campaign.setting import Setting

__all__ = [
    "Defence",
    "Entry",
    "Ledger",
    "Point",
    "Proposal",
    "Setting",
    "Trial",
    "Verdict",
    "auto",
    "chain",
    "frontier",
    "ledger",
    "of_tree",
    "planner",
    "rescaled_channels",
]
