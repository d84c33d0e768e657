"""The order of the tests of one process."""


def pytest_collection_modifyitems(items):
    """The jobs drawn at random first: one of them would be left alone with the last core at the end."""
    items.sort(key=lambda item: "trials" not in item.path.parts)
