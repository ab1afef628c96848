;; Starts with a table of 40 million elements.
(module (table 40000000 funcref) (func (export "run") (result i32) (table.size)))
