"""``verify --server``: is what a running server serves this model, as its files mean it?"""
