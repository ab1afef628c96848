"""Tools that we execute ourselves on what was judged, and programs run for a Call."""
