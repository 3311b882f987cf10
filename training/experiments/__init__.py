"""The paper's tables and figures: what each cell needs, made once; a record for every cell; one page of results."""
