"""The witness: somebody else's memory of how long a log was (C2SP tlog-witness).

``desk.py`` decides, ``state.py`` remembers, ``server.py`` speaks HTTP, ``client.py`` asks. Nothing
is loaded before it is asked for, as a runtime that asks needs no server.
"""
