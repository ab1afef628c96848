;; Would wait for ever on shared memory, where neither fuel nor epoch reaches it.
(module (memory 1 1 shared)
  (func (export "run") (result i32)
    (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1))))
