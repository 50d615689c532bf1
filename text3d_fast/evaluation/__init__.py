"""Any mesh measured against any mesh; the Toybox world is one source of truths."""
