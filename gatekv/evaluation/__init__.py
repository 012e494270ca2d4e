"""Evaluation at matched bytes: tasks, one shared prefill per sample, records that resume, paired intervals."""
