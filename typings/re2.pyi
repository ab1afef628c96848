# The part of google-re2 that is used.

class error(Exception): ...

class Options:
    max_mem: int
    log_errors: bool
    dot_nl: bool
    never_capture: bool

class _Match: ...

class _Regexp:
    @property
    def programsize(self) -> int: ...
    @property
    def reverseprogramsize(self) -> int: ...
    def fullmatch(self, text: bytes) -> _Match | None: ...

def compile(pattern: bytes, options: Options | None = None) -> _Regexp: ...
