"""Programs that make tasks and expert traces.

mtr        tools and traces from question-answering rows (docs/mtr.md)
eigendata  tasks of a domain with executable checkers (docs/eigendata.md)
traces     expert traces from reference calls or a teacher, verified by execution (docs/traces.md)
journal    finished rows on disk, from which a killed command continues
"""
