"""How the learned Toybox prior was trained. Not part of the installed package."""
