def causes_of_config(source, candidate):
    return []
