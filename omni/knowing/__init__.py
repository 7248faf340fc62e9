"""What a model knows of its own limits: whether an input is like those of training, and how sure an answer is.

    familiarity.py   the document in a checkpoint, and how it judges items, questions and answers
    statistics.py    statistics of the items and questions of training
    confidence.py    the probability that an answer is right, from the probabilities of its tokens

`omni.familiarise` measures these and writes the document.
"""
