"""How many training samples the built-in data sets have, for a run on paper. A test holds this against the data.

Contract: pure.
"""

TRAINING_SAMPLES = {"digits": 1437}
