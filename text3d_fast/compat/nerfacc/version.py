__version__ = "0.5.3"  # the version whose interface this is
