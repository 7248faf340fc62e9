"""The contract of a plug-in, as checks that its author runs: `omni check-plugin PACKAGE`.

    (plugin,) = find("omni-wave")
    for finding in examine(Subject(plugin)):
        print(finding.check, finding.result, finding.sentence)

The bundle is tried alone, then its encoder, then a small fused model with random weights and this encoder, and at last
every command of omni with this model. A check is one function. It raises `BrokenError`, whose sentence says what to mend.
"""
