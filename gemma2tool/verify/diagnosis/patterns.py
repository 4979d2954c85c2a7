def causes_of_patterns(case, names):
    return []
