"""How long a test waits for what should come by itself: ranks, processes, servers, jobs.

Wall time says little on a machine that does other work beside, so the limit only tells a hang from slowness: what takes
seconds on a quiet machine has ten minutes. SBN_TEST_LIMIT=SECONDS changes it. Where time itself is what a test is
about (deadlines, heartbeats), it says its own.
"""

import os

LIMIT_SECONDS = float(os.environ.get("SBN_TEST_LIMIT", "600"))
