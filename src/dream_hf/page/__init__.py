"""One question about one picture in a browser: both ways of decoding side by side, and the tree of the last step.

`answering` makes states out of models and a question, `html` and `tree_picture` write states as HTML; neither knows gradio.
"""
