"""All of these tests run under a faster interpreter."""

import faster_interpreter  # noqa: F401
