def finish(*a): return a
class Result: pass
