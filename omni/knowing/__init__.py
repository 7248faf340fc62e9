"""What a model knows of its own limits: whether an input is like those of training, and how sure an answer is.

    familiarity.py   the document in a checkpoint, and what it says of an answer
    statistics.py    what items and questions of training are like, in a few numbers
    confidence.py    how sure an answer is, from the probabilities of its tokens

`omni.familiarise` measures it and writes it down.
"""
