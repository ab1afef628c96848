;; One export per trap.
(module
  (memory 1)
  (func (export "unreachable") unreachable)
  (func (export "divide") (result i32) (i32.div_s (i32.const 1) (i32.const 0)))
  (func (export "bounds") (result i32) (i32.load (i32.const 65536)))
  (func $deep (export "stack") (call $deep)))
