def load(*a):
    pass
