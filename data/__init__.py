"""Objects, questions, tokenizer and data sets: everything the model is trained on is made here."""
