"What holds for all tests"
import signal

# a job started in the background ignores Ctrl-C, and so would all it starts; the tests press it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)
