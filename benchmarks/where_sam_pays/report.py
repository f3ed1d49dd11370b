def table(record):
    return ""


def draw(r):
    from matplotlib.figure import Figure

    return Figure()
