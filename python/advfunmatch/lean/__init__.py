"""Networks prepared for attacks: eval-mode copies whose batch norms are folded away."""

from __future__ import annotations

from .prepared import PreparedModel, prepare_for_attack
from .vjp import own_vjp, vjp
from .wrappers import unwrap

__all__ = ["PreparedModel", "own_vjp", "prepare_for_attack", "unwrap", "vjp"]
