"""What `test_command` has launched where ranks need only be there: a rank that says so and sleeps."""

import os
import time

from blsrdma.spawn import die_with_launcher

if __name__ == "__main__":
    die_with_launcher()
    os.write(2, b"here\n")  # in one piece, whatever the others write
    time.sleep(600)
