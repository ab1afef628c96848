"""The inside of ``http.get``: one request on a connection that was dialled for us (descriptor 3).

Runs as ``python -I -S -B http_worker.py SCHEME HOST AUTHORITY TARGET`` in a sandbox without
network, files or keys. Writes one line of JSON (status, headers) and then the body to stdout.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import ssl
import sys

CONNECTION = 3
_SECONDS = 300.0
_CERTIFICATES = "/etc/ssl/certs"


def main() -> int:
    """Make the request and copy the answer out; exit 0, or 1 with one line on stderr."""
    scheme, host, authority, target = sys.argv[1:5]
    try:
        stream = socket.socket(fileno=CONNECTION)
        stream.settimeout(_SECONDS)
        if scheme == "https":
            context = ssl.create_default_context(capath=_CERTIFICATES)
            stream = context.wrap_socket(stream, server_hostname=host)
        client = http.client.HTTPConnection(host)
        client.sock = stream
        headers = {"Host": authority, "Accept": "*/*", "User-Agent": "safeconduct"}
        client.request("GET", target, headers={**headers, "Connection": "close"})
        answer = client.getresponse()
        fields = [[name.lower(), value] for name, value in answer.getheaders()]
        head = json.dumps({"status": answer.status, "headers": fields})
        os.write(1, head.encode("ascii") + b"\n")
        with os.fdopen(1, "wb", closefd=False) as out:
            shutil.copyfileobj(answer, out)
    except (OSError, http.client.HTTPException, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
