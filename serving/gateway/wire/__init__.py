"""HTTP as it is on the wire: heads, paths, event streams, errors in each API's form, and the half that asks engines."""
