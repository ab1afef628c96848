"""A server of raw lines for tests: writes down the bytes it gets and answers them oddly spaced.

Tools: ``hang`` never answers, ``die`` ends the process, ``flood`` writes without a newline,
``junk`` writes what is no message first, ``forge`` answers requests that nobody made.
"""

import json
import os
import sys


def answer(number: object) -> bytes:
    """Spell a response as no encoder would."""
    text = json.dumps(number)
    return (
        b'{ "result" :{"content":[], "\xc3\xa9":1.50} ,"id": %s,"jsonrpc":"2.0"}\n' % text.encode()
    )


def main() -> None:
    """Serve until stdin ends."""
    with open("out/seen.bin", "ab", buffering=0) as seen:
        for line in sys.stdin.buffer:
            seen.write(line)
            message = json.loads(line)
            tool = message["params"]["name"] if message["method"] == "tools/call" else None
            if tool == "die":
                os._exit(3)
            if tool == "flood":
                while True:
                    os.write(1, b"x" * 65536)
            if tool == "junk":
                os.write(1, b'not a message\n{"jsonrpc":"2.0","id":1,"id":2,"result":{}}\n')
            if tool == "forge":
                os.write(1, answer(424242) + answer("guessed"))
            if tool == "stderr":
                os.write(2, b"\x1b]0;owned\x07 hello\n")
            if tool == "error":
                os.write(
                    1, b'{"jsonrpc":"2.0","id":%d,"result":{"isError":true}}\n' % message["id"]
                )
            elif "id" in message and tool != "hang":
                os.write(1, answer(message["id"]))


main()
