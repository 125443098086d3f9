# SPDX-License-Identifier: MIT-0
"""Starts the extension. The launcher runs this file.

main() registers the extension, and only then imports extension.py. Lambda starts the function's
runtime once all extensions have registered, so the imports in extension.py run while the runtime
starts. If the function's module needs something, such as a secret, as soon as it is imported, fetch
that here, above the call of main().
"""

from lifecycle import main

if __name__ == "__main__":  # not when multiprocessing imports this file
    main()
