"""States of recurrent and convolutional layers over draft trees: every node goes on from its parent's."""
