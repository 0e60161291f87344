"""What drafts: one folder a kind, and what they share."""
