"""AutoAttack beside the programs that people evaluate with today."""
