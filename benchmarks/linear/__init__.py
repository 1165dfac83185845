"""The loss fused with its projection (linear_kl_div), against what makes the logits or chunks of them."""
