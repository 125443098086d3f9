# SPDX-License-Identifier: MIT-0
"""Starts the extension. The launcher runs this file.

The extension registers first, and only then imports extension.py. Lambda starts the function's
runtime once all extensions have registered, so no import in extension.py delays the function.
What the function's module needs while it is imported, such as a secret, fetch above main().
"""

from lifecycle import main

if __name__ == "__main__":  # and not when multiprocessing imports this file
    main()
