"""Entry of the worker's processes: `python FOLDER supervisor SETTINGS`, or `python FOLDER tool …` inside bubblewrap."""

import os
import sys

if __name__ == "__main__":
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[0] = os.path.dirname(folder)  # for the next import only: tools must not find the files beside this folder
    worker = __import__(os.path.basename(folder), fromlist=["supervisor"])
    if sys.argv[1] == "supervisor":
        from worker.supervisor import main
    else:
        from worker.bubblewrap import main
    del sys.path[0]
    main(sys.argv[2:])
