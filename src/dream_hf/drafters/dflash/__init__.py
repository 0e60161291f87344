"""DFlash: block diffusion, of which one forward gives the tokens of a whole block (arXiv 2602.06036)."""
