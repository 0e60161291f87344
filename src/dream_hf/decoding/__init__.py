"""The loop: a tree is drafted, the target verifies it in one forward, a path is kept. Knows no drafter."""
