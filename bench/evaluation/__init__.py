"""Questions with known answers, asked of bundles: metrics with intervals, and paired comparisons.

questions     what is asked, and the JSONL form of it
formats       the published forms of common sets
answering     one bundle answers one question
workers       which process does so; cluster: on which machine
ledger        the file of answers, from which a stopped run goes on
text          what an answer says
metrics       whether that is right
intervals     how sure that is
summary       the figures of all bundles
evaluator     all of it, in order
"""
