"""Evaluation at matched bytes: tasks, one shared prefill per sample, paired intervals."""
