def causes_of_tokenizer(source, candidate, results):
    return []
