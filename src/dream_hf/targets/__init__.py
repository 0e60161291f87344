"""The only folder that looks inside target models."""
