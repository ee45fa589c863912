"""Entry of the worker's processes: `python FOLDER server SETTINGS`, or `python FOLDER tool …` inside bubblewrap."""

import os
import sys

if __name__ == "__main__":
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[0] = os.path.dirname(folder)  # for the next import only: tools must not find the files beside this folder
    worker = __import__(os.path.basename(folder), fromlist=["fork_server"])
    if sys.argv[1] == "server":
        from worker.fork_server import main
    else:
        from worker.bubblewrap import main
    del sys.path[0]
    main(sys.argv[2:])
