;; Correct calls: each number type crosses the border, and a recursive factorial.
(module
  (func (export "add") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1)))
  (func $factorial (export "factorial") (param i64) (result i64)
    (if (result i64) (i64.eqz (local.get 0))
      (then (i64.const 1))
      (else (i64.mul (local.get 0) (call $factorial (i64.sub (local.get 0) (i64.const 1)))))))
  (func (export "half") (param f64) (result f64) (f64.mul (local.get 0) (f64.const 0.5)))
  (func (export "special") (result f64 f64 f32)
    (f64.div (f64.const 0) (f64.const 0)) (f64.const -inf) (f32.const 1.5))
  (func (export "nothing"))
  (func (export "vector") (result v128) (v128.const i64x2 1 2)))
