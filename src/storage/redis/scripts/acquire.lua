-- Takes KEYS[1] for the token ARGV[1] and ARGV[2] milliseconds, if it is free or has that token already.
-- Answers the token if it was taken, else the milliseconds that the holder has left (-1: it never expires).
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then
  return redis.call('PTTL', KEYS[1])
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ARGV[1]
